"""Every comparison of speed, side by side with the peers, in one command.

python benchmarks/speed/run.py [--only attacks,steps,losses,augment,startup] [--quick] [--out DIR]
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the modules beside it are those of the package `speed`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from speed.command import main

if __name__ == "__main__":
    sys.exit(main())
