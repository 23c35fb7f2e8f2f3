"""What the suite answers today, as text that another version of the code must answer too.

`tests/freeze.py` writes and compares it; `PARTS` names every frozen answer. A part is made through
the doors that users have: the command line and the import paths of plug-ins. It holds no time, no
path of this machine and no hash of code.
"""

from __future__ import annotations

from tests.freezing import laws, pages, plans, reference, surface
from tests.freezing.golden import Part

PARTS: dict[str, Part] = {
    part.name: part
    for part in (*surface.PARTS, *plans.PARTS, *pages.PARTS, *laws.PARTS, *reference.PARTS)
}
