import sys

from gradbuffer.command_line import main

sys.exit(main())
