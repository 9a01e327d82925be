"""Which rank measures what, and when: a function of messages. Devices first, then links.

Measurements must not disturb each other. So a measurement claims what it loads: a GPU itself, a rank on the CPU the
cores of its host, a link both its hosts. Those that claim different things go on at the same time; the others wait.
"""

from collections.abc import Mapping
from itertools import chain
from typing import NamedTuple

import msgspec

from hetis.core.fleet import DeviceInfo
from hetis.core.messages import Measure, Measured, MeasureLink, ProfileReport, Setup
from hetis.core.model_spec import DTYPE_BYTES
from hetis.core.plan import Plan
from hetis.core.profile import DenseProfile, DeviceProfile, FleetProfile, LinkProfile, PrefillProfile, ProfileKey
from hetis.cost.fit import fit_attention, fit_dense, fit_prefill, fit_transfer
from hetis.cost.footprint import layer_weights
from hetis.cost.memory import usable_share

# What a part may take. Devices that are not slow need half of it; an eighth of them still gives a usable fit.
ATTENTION_SECONDS = 2.0
DENSE_SECONDS = 2.5
LINK_SECONDS = 0.3

Claim = tuple[str, str]  # (host, device)
Kind = tuple[ProfileKey, int]  # ranks of one kind are measured once: those with one key, or (key, rank) that rank alone
ALL = -1


class _Job(NamedTuple):
    ranks: tuple[int, ...]  # get the message, and answer
    wanted: frozenset[int]  # whose answers count; the others only take part
    message: Measure | MeasureLink
    claims: frozenset[Claim]


class _Part(NamedTuple):
    """Something that was measured, by whom, and how long that took."""

    rank: int
    seconds: float


class Profiling:
    """Measures one fleet. `start` and `on_measured` give what is to be sent now; when finished there is a `report`."""

    def __init__(self, setup: Setup, known: Mapping[ProfileKey, DeviceProfile], *, share: bool) -> None:
        """`known`: from the cache. `share`: ranks with the same key are measured once; if not, each by itself."""
        assert share or not known, "what was measured for another rank is of no use here"
        self._setup, self._plan, self._share = setup, setup.plan, share
        self._infos = {info.rank: info for info in setup.fleet}
        self._keys = {info.rank: profile_key(info, setup) for info in setup.fleet}
        self._devices = {(key, ALL): known[key] for key in self._keys.values() if key in known}
        self._dense = {
            ((key, ALL), profile.dense.num_ranks): (profile.dense, profile.prefill)
            for (key, _), profile in self._devices.items()
            if profile.dense is not None
        }
        self._links: list[LinkProfile] = []
        self._parts: dict[Kind, list[_Part]] = {}
        self._waiting = [*self._attention_jobs(), *self._dense_jobs()]
        self._waiting_links = self._link_jobs()
        self._running: dict[int, _Job] = {}  # by rank that has not answered

    @property
    def is_finished(self) -> bool:
        return not (self._running or self._waiting or self._waiting_links)

    # --- who measures -------------------------------------------------------------------------------------------------

    def _attention_jobs(self) -> list[_Job]:
        first: dict[Kind, int] = {}
        for rank in self._infos:
            first.setdefault(self._kind(rank), rank)
        message = Measure(part="attention", seconds=ATTENTION_SECONDS)
        wanted = [rank for kind, rank in first.items() if kind not in self._devices]
        return [_Job((rank,), frozenset((rank,)), message, self._claims((rank,))) for rank in wanted]

    def _dense_jobs(self) -> list[_Job]:
        jobs, met = [], set(self._dense)
        message = Measure(part="dense", seconds=DENSE_SECONDS)
        for stage in self._plan.stages:
            ranks = tuple(primary.rank for primary in stage.primaries)
            wanted = []
            for rank in ranks:
                if (what := (self._kind(rank), len(ranks))) not in met:
                    met.add(what)
                    wanted.append(rank)
            if wanted:
                jobs.append(_Job(ranks, frozenset(wanted), message, self._claims(ranks)))
        return jobs

    def _link_jobs(self) -> list[_Job]:
        return [
            _Job(
                (primary, worker),
                frozenset((primary,)),
                MeasureLink(primary=primary, worker=worker, seconds=LINK_SECONDS),
                frozenset((self._infos[rank].host, "") for rank in (primary, worker)),
            )
            for primary, worker in links_of(self._plan)
        ]

    def _claims(self, ranks: tuple[int, ...]) -> frozenset[Claim]:
        return frozenset((self._infos[rank].host, self._infos[rank].device) for rank in ranks)

    def _kind(self, rank: int) -> Kind:
        return self._keys[rank], ALL if self._share else rank

    # --- when ---------------------------------------------------------------------------------------------------------

    def start(self) -> list[tuple[int, Measure | MeasureLink]]:
        """(rank, message) to be sent first."""
        return self._next()

    def on_measured(self, answer: Measured) -> list[tuple[int, Measure | MeasureLink]]:
        """Takes an answer; (rank, message) to be sent now."""
        job = self._running.pop(answer.rank)
        if answer.rank in job.wanted:
            if isinstance(job.message, MeasureLink):
                self._keep_link(job.message, answer)
            elif job.message.part == "attention":
                self._keep_attention(answer)
            else:
                self._keep_dense(answer)
        return self._next()

    def _next(self) -> list[tuple[int, Measure | MeasureLink]]:
        if not (self._running or self._waiting):
            self._waiting, self._waiting_links = self._waiting_links, []
        taken = set(chain.from_iterable(job.claims for job in self._running.values()))
        later, now = [], []
        for job in self._waiting:
            if job.claims & taken:
                later.append(job)
            else:
                taken |= job.claims
                self._running |= dict.fromkeys(job.ranks, job)
                now += [(rank, job.message) for rank in job.ranks]
        self._waiting = later
        return now

    # --- what came out ------------------------------------------------------------------------------------------------

    def _keep_attention(self, answer: Measured) -> None:
        kind = self._kind(answer.rank)
        self._parts.setdefault(kind, []).append(_Part(answer.rank, answer.seconds))
        self._devices[kind] = DeviceProfile(
            key=kind[0],
            attention=fit_attention(answer.attention),
            read_bytes_per_us=answer.read_bytes_per_us,
            usable_bytes=0,
        )

    def _keep_dense(self, answer: Measured) -> None:
        kind, (stage, index) = self._kind(answer.rank), self._plan.position_of(answer.rank)
        primaries = self._plan.stages[stage].primaries
        self._parts.setdefault(kind, []).append(_Part(answer.rank, answer.seconds))
        num_weights = layer_weights(self._setup.spec, primaries[index], index)
        dense = fit_dense(answer.dense, num_weights, num_weights * DTYPE_BYTES[self._setup.dtype], len(primaries))
        self._dense[kind, len(primaries)] = dense, fit_prefill(answer.prefill)

    def _keep_link(self, asked: MeasureLink, answer: Measured) -> None:
        request, reply = fit_transfer(answer.request), fit_transfer(answer.reply)
        self._links.append(LinkProfile(primary=asked.primary, worker=asked.worker, request=request, reply=reply))

    def report(self) -> ProfileReport:
        """Every rank and link."""
        assert self.is_finished, "some have not answered"
        links = tuple(sorted(self._links, key=lambda link: (link.primary, link.worker)))
        devices = {rank: self._device(rank) for rank in self._infos}
        return ProfileReport(
            profile=FleetProfile(devices=devices, links=links), sources={rank: self._source(rank) for rank in devices}
        )

    def new(self) -> list[DeviceProfile]:
        """What the cache does not have, one profile for each key: a primary's where there is one, for it has more."""
        primaries = [primary.rank for stage in self._plan.stages for primary in stage.primaries]
        first: dict[ProfileKey, int] = {}
        for rank in [*primaries, *self._infos]:
            if self._kind(rank) in self._parts:
                first.setdefault(self._keys[rank], rank)
        return [self._device(rank) for rank in first.values()]

    def _device(self, rank: int) -> DeviceProfile:
        info, kind = self._infos[rank], self._kind(rank)
        dense: DenseProfile | None = None
        prefill: PrefillProfile | None = None
        if self._plan.role_of(rank) == "primary":
            stage, _ = self._plan.position_of(rank)
            dense, prefill = self._dense[kind, len(self._plan.stages[stage].primaries)]
        usable = int(info.free_memory * usable_share(info.device))
        return msgspec.structs.replace(self._devices[kind], usable_bytes=usable, dense=dense, prefill=prefill)

    def _source(self, rank: int) -> str:
        parts = self._parts.get(self._kind(rank), [])
        own = [part.seconds for part in parts if part.rank == rank]
        if own:
            return f"measured in {sum(own):.1f} s"
        return f"as rank {parts[0].rank}" if parts else "cache"


def profile_key(info: DeviceInfo, setup: Setup) -> ProfileKey:
    """What is the same for ranks that need not be measured twice."""
    return ProfileKey(
        device=f"{info.name}, {info.num_threads} threads" if info.device == "cpu" else info.name,
        driver=info.driver,
        dtype=setup.dtype,
        head_dim=setup.spec.head_dim,
        queries_per_group=setup.spec.queries_per_group,
        backend=info.backend,
    )


def links_of(plan: Plan) -> list[tuple[int, int]]:
    """(primary, worker) of every link."""
    primaries = [primary.rank for stage in plan.stages for primary in stage.primaries]
    return [(primary, worker.rank) for primary in primaries for worker in plan.workers]


def report_of(profile: FleetProfile, plan: Plan, name: str) -> ProfileReport:
    """For a profile that was read from the file `name`. Raises ValueError where it lacks a rank or link of `plan`."""
    devices, found = profile.devices, {(link.primary, link.worker) for link in profile.links}
    lacking = [f"rank {member.rank}" for member in plan.members() if member.rank not in devices]
    lacking += [
        f"layers of rank {primary.rank}"
        for stage in plan.stages
        for primary in stage.primaries
        if primary.rank in devices and devices[primary.rank].dense is None
    ]
    lacking += [f"link {primary}->{worker}" for primary, worker in links_of(plan) if (primary, worker) not in found]
    if lacking:
        raise ValueError(
            f"profile {name} lacks {', '.join(lacking)}; run `hetis profile` with this plan, or leave it out."
        )
    return ProfileReport(profile=profile, sources={member.rank: name for member in plan.members()})
