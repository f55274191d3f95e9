"""Where in a transformer do several tasks interfere? A Lightning callback that answers per head."""

import lazy_loader

__version__ = "0.1.0"

# The names are in `__init__.pyi`. Each is imported when it is first used: `qkov --help` needs no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
