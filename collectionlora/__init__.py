__version__ = "0.1.0"

from collectionlora import _compat  # noqa: F401  first, before anything can import torchvision

from collectionlora.files.earlier import keep_earlier_names

keep_earlier_names()
