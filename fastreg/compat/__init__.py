"""Other packages' losses and layers on fastreg's ops: change the import, keep the script.

``fastreg.compat.<package>`` has the constructors, layouts, signs, shapes and defaults of that package, and does not import it.
Where its results differ on purpose, a row of the module's ``DIFFERENCES`` says how and why; docs/compat.md prints them.
"""

from typing import NamedTuple


class Difference(NamedTuple):
    name: str  # of the class or function
    theirs: str
    ours: str
    why: str
