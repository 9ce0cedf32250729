"""Check a project from a machine of a Ray cluster.

export RAY_AUTH_MODE=token
ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/check.py PROJECT --model

PROJECT is the absolute path or URI of a project file that all nodes can read. Takes the options of `raymerge check`.
It changes nothing: submit it as often as you like.
"""

import sys

from raymerge.cli import main

if __name__ == "__main__":
    main(["check", *sys.argv[1:]])
