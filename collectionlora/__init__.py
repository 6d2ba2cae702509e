__version__ = "0.1.0"

from collectionlora import _compat  # noqa: F401  first, before anything can import torchvision
