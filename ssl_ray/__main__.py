import sys

from ssl_ray.cli import main

sys.exit(main())
