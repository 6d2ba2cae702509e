__version__ = "0.1.0"

from collectionlora import _compat  # noqa: F401  first, before anything can import torchvision

from collectionlora.files.earlier import keep_earlier_names

keep_earlier_names()

__all__ = ['__version__', 'Collection', 'load_base']


def __getattr__(name):
    "`Collection` and `load_base`, loaded when they are asked for: torch and diffusers take seconds."
    if name == 'Collection':
        from collectionlora.use.edit import Collection

        return Collection
    if name == 'load_base':
        from collectionlora.use.edit import open_base

        return open_base
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return sorted({*globals(), *__all__})
