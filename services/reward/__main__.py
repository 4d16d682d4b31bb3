"""``python -m services.reward -c FILE`` starts one reward replica."""

import sys

from services.common.lifecycle import run_service
from services.reward.replica import serve

if __name__ == "__main__":
    sys.exit(run_service("reward", serve))
