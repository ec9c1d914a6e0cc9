"""Setting up and starting Stretto's surroundings. Standard library only: it runs before anything is installed."""

import sys

# First of all: the modules beside this one do not even import on older interpreters.
if sys.version_info < (3, 10):
    sys.exit("Stretto needs Python 3.10 to 3.14, and this is %d.%d: set PYTHON to another." % sys.version_info[:2])
