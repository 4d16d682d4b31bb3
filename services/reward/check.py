"""A scorer tried before the run: does it import, and does it score one sample without raising or hanging?"""

from __future__ import annotations

from polyhead.v1 import reward_pb2, sample_pb2
from services.common.config import Config
from services.common.errors import ConfigError
from services.reward.items import item_of_request
from services.reward.pool import ScorerPool
from services.reward.settings import scorer_settings


async def check_scorer(config: Config, prompt: sample_pb2.Prompt) -> None:
    """Scores `prompt` with its own label as completion. Any score will do.

    Raises ConfigError when the scorer does not import, raises, hangs or gives what is no score.
    """
    pool = ScorerPool(scorer_settings(config), processes=1, timeout_s=config.reward.score_timeout_s)
    try:
        await pool.start()
        item = reward_pb2.ScoreItem(sample_id="check", prompt=prompt, completion=prompt.label)
        [result] = await pool.score([item_of_request(item, 0)])
    finally:
        await pool.close()
    if result.failure is not None:
        raise ConfigError(f"{config.reward.scorer} fails on the first prompt: {result.reason}", field="reward.scorer")
