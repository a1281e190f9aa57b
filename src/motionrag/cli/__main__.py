"""``python -m motionrag.cli`` is ``motionrag``."""

import sys

from motionrag.cli import main

sys.exit(main())
