"""How long a test waits for something that takes a moment: against hanging only.

How fast or busy the machine is must not decide a test, so nothing waits for less than this, and no duration is asserted
from above except against a wait that would be far longer.
"""

PATIENCE_S = 300.0
