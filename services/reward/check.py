"""A scorer tried before the run: does it import, and does it score a sample or group without raising or hanging?"""

from __future__ import annotations

from polyhead.v1 import reward_pb2, sample_pb2
from services.common.config import Config
from services.common.errors import ConfigError, UnavailableError
from services.reward.items import item_of_request
from services.reward.jobs import FailureKind
from services.reward.opening import running_station


async def check_scorer(config: Config, prompt: sample_pb2.Prompt) -> None:
    """Scores `prompt` with its own label as completion, of a whole group where groups are scored. Any score will do.

    Raises ConfigError when the scorer does not import, raises, hangs or gives what is no score, and UnavailableError
    when it is elsewhere and does not answer.
    """
    async with running_station(config, processes=1) as station:
        item = reward_pb2.ScoreItem(sample_id="check", prompt=prompt, completion=prompt.label)
        samples = config.batch.n_samples_per_prompt if station.scores_whole else 1
        result = (await station.score([item_of_request(item, place) for place in range(samples)]))[0]
    if result.failure is FailureKind.UNAVAILABLE and config.reward.remote.urls:
        raise UnavailableError(result.reason, field="reward.remote.urls")
    if result.failure is not None:
        raise ConfigError(f"{config.reward.scorer} fails on the first prompt: {result.reason}", field="reward.scorer")
