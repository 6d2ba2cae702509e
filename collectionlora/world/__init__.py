"""The procedural world: drawing, general edits, effects and the oracle, under one name."""
from .draw import *
from .edits import *
from .effects import *
from .figures import *
from .oracle import *
from .pen import *
from .places import *
from .styles import *
from .things import *
