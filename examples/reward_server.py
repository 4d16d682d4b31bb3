"""A reward model of your own, served to Polyhead over gRPC: ``python examples/reward_server.py 127.0.0.1:9000``.

In the run's configuration: [reward] scorer = "remote", and [reward.remote] kind = "grpc", urls = "grpc://127.0.0.1:9000".
"""

import asyncio
import sys

import grpc

from polyhead.v1 import reward_pb2, reward_pb2_grpc, sample_pb2


def reward(prompt: sample_pb2.Prompt, completion: str) -> float:
    """Put your model here. This one likes completions as long as the label; what it cannot score, it raises."""
    if not prompt.label:
        raise ValueError("the prompt has no label")
    return 1 / (1 + abs(len(completion) - len(prompt.label)))


class RewardServer(reward_pb2_grpc.RewardServiceServicer):
    async def Score(self, request: reward_pb2.ScoreRequest, _: object) -> reward_pb2.ScoreResponse:  # noqa: N802 - gRPC's name
        return reward_pb2.ScoreResponse(results=[self._result(item) for item in request.items])

    def _result(self, item: reward_pb2.ScoreItem) -> reward_pb2.ScoreResult:
        try:
            score = sample_pb2.Score(reward=reward(item.prompt, item.completion), scorer="length")
        except ValueError as why:  # never a made-up number: after some attempts the sample becomes a dead letter
            error = reward_pb2.ScoreError(kind=reward_pb2.SCORE_ERROR_KIND_FAILED, message=str(why))
            return reward_pb2.ScoreResult(sample_id=item.sample_id, error=error)
        return reward_pb2.ScoreResult(sample_id=item.sample_id, score=score)


async def main(address: str) -> None:
    server = grpc.aio.server()
    reward_pb2_grpc.add_RewardServiceServicer_to_server(RewardServer(), server)
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
