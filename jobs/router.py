"""Train and tune the router of a project on a Ray cluster.

export RAY_AUTH_MODE=token
ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/router.py PROJECT

PROJECT is the absolute path or URI of a project file that all nodes can read. Takes the options of `raymerge router`.
Jobs are idempotent: to recover, submit the same again.
"""

import sys

from raymerge.cli import main

if __name__ == "__main__":
    main(["router", *sys.argv[1:]])
