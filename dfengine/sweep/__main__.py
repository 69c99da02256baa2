"""Run a worker process: `python -m dfengine.sweep <file descriptor of its pipe>`."""

import sys
from multiprocessing.connection import Connection

from dfengine.sweep.process_pool import serve

serve(Connection(int(sys.argv[1])))
