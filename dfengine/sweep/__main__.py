"""A worker process: `python -m dfengine.sweep <file descriptor of its pipe>`."""

import sys
from multiprocessing.connection import Connection

from dfengine.sweep.processes import serve

serve(Connection(int(sys.argv[1])))
