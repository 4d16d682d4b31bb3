"""The queues of a pool: one for each scorer, so that none waits for another one which is slow or hangs.

A queue is called a lane. The next jobs come from the lane that has used the least time so far (start-time fair
queueing: a lane that had nothing to do begins where the others are). A lane whose last score ran out of time or ended
its process is *suspect* until something is scored or refused again: while others have work it gets one process at a
time, which is none of theirs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from services.reward.jobs import AnyItem, Job
from services.reward.scorers.base import Item, SampleError
from services.reward.scorers.metadata import rm_type_of

MAX_WINDOW = 64
# A window holds about this much work.
WINDOW_S = 0.005
# A score that takes longer than this, and than so many scores of its lane take, is set aside.
STALL_S = 0.25
_STALL_SCORES = 20
_STALL_SHARE = 0.25
_SMOOTHING = 0.1
# Names come from data: what is named beyond these shares a lane.
_MOST_LANES = 64
_LAST_LANE = "others"


class Lane:
    """The jobs of one scorer that wait, and what its scores take."""

    __slots__ = ("in_flight", "jobs", "mean_s", "running", "suspect", "used_s")

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.running = 0
        """Processes that are on its jobs."""
        self.in_flight = 0
        """Jobs that these have."""
        self.mean_s = WINDOW_S
        self.used_s = 0.0
        self.suspect = False

    @property
    def window(self) -> int:
        """Jobs that a process gets ahead."""
        return 1 if self.suspect else max(1, min(MAX_WINDOW, int(WINDOW_S / self.mean_s)))

    @property
    def due_s(self) -> float:
        """What it will have used when its jobs in flight are done."""
        return self.used_s + self.in_flight * self.mean_s

    def stall_s(self, timeout_s: float) -> float:
        """After this time a score is taken for one that may hang."""
        return min(max(STALL_S, _STALL_SCORES * self.mean_s), _STALL_SHARE * timeout_s)

    def answered(self, seconds: float) -> None:
        """The scorer has said something of a job in flight, after this time."""
        self.in_flight -= 1
        self.suspect = False
        self.used_s += seconds
        self.mean_s += _SMOOTHING * (max(seconds, 1e-6) - self.mean_s)

    def lost(self) -> None:
        """A job in flight ran out of time, or ended its process."""
        self.in_flight -= 1
        self.suspect = True

    def take(self, most: int) -> list[Job]:
        """The next jobs, those that were cancelled left out."""
        taken: list[Job] = []
        while self.jobs and len(taken) < most:
            if not (job := self.jobs.popleft()).cancelled:
                taken.append(job)
        self.in_flight += len(taken)
        return taken

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Jobs in flight are to wait again, before all others."""
        self.in_flight -= len(jobs)
        self.jobs.extendleft(reversed(jobs))


class Lanes:
    """All lanes of a pool of `processes`, from the first job of each on."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._lanes: dict[str, Lane] = {}

    def add(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            lane = self._lane(lane_of(job.item))
            if not lane.jobs and not lane.running:
                lane.used_s = max(lane.used_s, min((each.used_s for each in self._busy(but=lane)), default=0.0))
            lane.jobs.append(job)

    def next(self, *, place: bool, spare: bool) -> Lane | None:
        """The lane whose turn it is, of those that may have another process.

        `place` says whether one of the pool's processes is free, `spare` whether there is one more than these.
        """
        may = [lane for lane in self._lanes.values() if lane.jobs and self._may(lane, place=place, spare=spare)]
        return min(may, key=lambda lane: lane.due_s, default=None)

    def _may(self, lane: Lane, *, place: bool, spare: bool) -> bool:
        if self.is_held_back(lane):
            return spare and not lane.running
        # A scorer that is alone may have them all, and those that stand in for what it has set aside.
        return place and lane.running < self._processes * (2 if len(self._lanes) == 1 else 1)

    def is_held_back(self, lane: Lane) -> bool:
        """Whether it gets one process at a time, and none of the pool's own: it is suspect, and others have work."""
        return lane.suspect and any(not each.suspect for each in self._busy(but=lane))

    def others_wait(self, lane: Lane) -> bool:
        return any(each.jobs for each in self._lanes.values() if each is not lane and not self.is_held_back(each))

    @property
    def suspects_wait(self) -> bool:
        """Whether one is to have a process, or may come to be."""
        return any(lane.suspect and not lane.running for lane in self._lanes.values())

    @property
    def waiting(self) -> bool:
        return any(lane.jobs for lane in self._lanes.values())

    @property
    def held_back(self) -> int:
        """How many jobs wait in suspect lanes, which may be held back as soon as there are others."""
        return sum(len(lane.jobs) for lane in self._lanes.values() if lane.suspect)

    def clear(self) -> list[Job]:
        """Takes all jobs that wait out."""
        jobs = [job for lane in self._lanes.values() for job in lane.jobs]
        for lane in self._lanes.values():
            lane.jobs.clear()
        return jobs

    def _lane(self, name: str) -> Lane:
        if name not in self._lanes and len(self._lanes) >= _MOST_LANES:
            name = _LAST_LANE
        return self._lanes.setdefault(name, Lane())

    def _busy(self, *, but: Lane) -> list[Lane]:
        return [lane for lane in self._lanes.values() if lane is not but and (lane.jobs or lane.running)]


def lane_of(item: AnyItem) -> str:
    """The name of its lane: of a sample what its metadata asks for, whether or not it gets that."""
    if not isinstance(item, Item):
        return type(item).__name__
    try:
        return str(rm_type_of(item) or "")
    except SampleError:
        return ""
