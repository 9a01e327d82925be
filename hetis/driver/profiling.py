"""Schedules the measurements of a fleet: which rank measures what, and when. Devices come first, then links.

Measurements must not disturb each other, so each claims what it loads: a rank on a GPU that GPU, a rank on the CPU the
cores of its host, a link both its hosts. Measurements with disjoint claims run at the same time; the others wait.
"""

from collections.abc import Mapping
from itertools import chain
from typing import NamedTuple

import msgspec

from hetis import __version__
from hetis.core.device_info import DeviceInfo
from hetis.core.messages import Measure, Measured, MeasureLink, ProfileReport, Setup
from hetis.core.model_spec import DTYPE_BYTES
from hetis.core.plan import Plan
from hetis.core.profile import (
    DeviceProfile,
    FleetProfile,
    KindProfile,
    LayerProfile,
    LayerShare,
    LinkProfile,
    ProfileKey,
)
from hetis.core.sizes import plural
from hetis.cost.fit import fit_attention, fit_dense, fit_prefill, fit_transfer
from hetis.cost.footprint import layer_weights
from hetis.cost.needs import usable_share

# Time limits of a measurement. Most devices need half of it; with an eighth the fit is still usable.
ATTENTION_SECONDS = 2.0
DENSE_SECONDS = 2.5
LINK_SECONDS = 0.3

Claim = tuple[str, str]  # a device, or (host, "")
Kind = tuple[ProfileKey, int]  # ranks of one kind are measured once: (key, ALL), or (key, rank) for that rank alone
Part = tuple[Kind, LayerShare | None]  # a share of the layers, or None: decode attention
ALL = -1


class _Job(NamedTuple):
    ranks: tuple[int, ...]  # that get the message, and answer
    wanted: frozenset[int]  # ranks whose answers are used; the others only take part
    message: Measure | MeasureLink
    claims: frozenset[Claim]


class _Source(NamedTuple):
    """The rank that measured a part, and how long that took."""

    rank: int
    seconds: float


class Profiling:
    """The measurements of one fleet. `start` and `on_measured` return messages to send; then comes a report."""

    def __init__(self, setup: Setup, known: Mapping[ProfileKey, KindProfile], *, share: bool) -> None:
        """`known`: from the cache. `share`: ranks with the same key are measured once; if not, each by itself."""
        assert share or not known, "the cache holds measurements of other ranks"
        self._setup, self._plan, self._share = setup, setup.plan, share
        self._infos = {info.rank: info for info in setup.fleet}
        self._keys = {info.rank: profile_key(info, setup) for info in setup.fleet}
        self._devices = {(key, ALL): known[key] for key in self._keys.values() if key in known}
        self._layers = {(kind, layer.share): layer for kind, found in self._devices.items() for layer in found.layers}
        self._links: list[LinkProfile] = []
        self._sources: dict[Part, _Source] = {}  # of what was measured now
        self._waiting = [*self._attention_jobs(), *self._dense_jobs()]
        self._waiting_links = self._link_jobs()
        self._running: dict[int, _Job] = {}  # by rank that has not answered
        self.num_jobs = len(self._waiting) + len(self._waiting_links)

    @property
    def num_done(self) -> int:
        """Number of jobs that all their ranks have answered."""
        running = len({id(job) for job in self._running.values()})
        return self.num_jobs - running - len(self._waiting) - len(self._waiting_links)

    @property
    def is_finished(self) -> bool:
        return not (self._running or self._waiting or self._waiting_links)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def _attention_jobs(self) -> list[_Job]:
        first: dict[Kind, int] = {}
        for rank in self._infos:
            first.setdefault(self._kind(rank), rank)
        message = Measure(part="attention", seconds=ATTENTION_SECONDS)
        wanted = [rank for kind, rank in first.items() if kind not in self._devices]
        return [_Job((rank,), frozenset((rank,)), message, self._claims((rank,))) for rank in wanted]

    def _dense_jobs(self) -> list[_Job]:
        jobs, met = [], set(self._layers)
        message = Measure(part="dense", seconds=DENSE_SECONDS)
        for stage in self._plan.stages:
            wanted = []
            for rank in stage.ranks:
                if (part := (self._kind(rank), layer_share(self._setup, rank))) not in met:
                    met.add(part)
                    wanted.append(rank)
            if wanted:
                jobs.append(_Job(stage.ranks, frozenset(wanted), message, self._claims(stage.ranks)))
        return jobs

    def _link_jobs(self) -> list[_Job]:
        return [
            _Job(
                (home.rank, worker.rank),
                frozenset((home.rank,)),
                MeasureLink(primary=home.rank, worker=worker.rank, seconds=LINK_SECONDS),
                frozenset((self._infos[rank].host, "") for rank in (home.rank, worker.rank)),
            )
            for home, worker in self._plan.links
        ]

    def _claims(self, ranks: tuple[int, ...]) -> frozenset[Claim]:
        return frozenset(self._infos[rank].place for rank in ranks)

    def _kind(self, rank: int) -> Kind:
        return self._keys[rank], ALL if self._share else rank

    # --- order --------------------------------------------------------------------------------------------------------

    def start(self) -> list[tuple[int, Measure | MeasureLink]]:
        """(rank, message) of the measurements that start first."""
        return self._next()

    def on_measured(self, answer: Measured) -> list[tuple[int, Measure | MeasureLink]]:
        """Takes an answer; (rank, message) of the measurements that can start now."""
        job = self._running.pop(answer.rank)
        if answer.rank in job.wanted:
            if isinstance(job.message, MeasureLink):
                self._keep_link(job.message, answer)
            elif job.message.part == "attention":
                self._keep_attention(answer)
            else:
                self._keep_layer(answer)
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

    # --- results ------------------------------------------------------------------------------------------------------

    def _keep_attention(self, answer: Measured) -> None:
        kind = self._kind(answer.rank)
        self._sources[kind, None] = _Source(answer.rank, answer.seconds)
        self._devices[kind] = KindProfile(
            key=kind[0], attention=fit_attention(answer.attention), read_bytes_per_us=answer.read_bytes_per_us
        )

    def _keep_layer(self, answer: Measured) -> None:
        kind, share = self._kind(answer.rank), layer_share(self._setup, answer.rank)
        self._sources[kind, share] = _Source(answer.rank, answer.seconds)
        dense = fit_dense(answer.dense, share.num_weights, share.num_weights * DTYPE_BYTES[self._setup.dtype])
        prefill = fit_prefill(answer.prefill) if share.num_groups else None
        self._layers[kind, share] = LayerProfile(share=share, dense=dense, prefill=prefill)

    def _keep_link(self, asked: MeasureLink, answer: Measured) -> None:
        request, reply = fit_transfer(answer.request), fit_transfer(answer.reply)
        self._links.append(LinkProfile(primary=asked.primary, worker=asked.worker, request=request, reply=reply))

    def report(self) -> ProfileReport:
        """The profile of every rank and link, when all measurements are finished."""
        assert self.is_finished, "some ranks have not answered"
        links = tuple(sorted(self._links, key=lambda link: (link.primary, link.worker)))
        devices = {rank: self._device(rank) for rank in self._infos}
        return ProfileReport(
            profile=FleetProfile(devices=devices, links=links),
            sources={rank: self._source(rank) for rank in devices},
            devices={info.rank: info.device for info in self._setup.fleet},
        )

    def new(self) -> list[KindProfile]:
        """Profiles that the cache lacks: kinds of which a part was measured, each with all its layers."""
        assert self._share, "measurements of single ranks are not kept"
        measured = {kind for kind, _ in self._sources}
        return [
            msgspec.structs.replace(
                found, layers=tuple(layer for (its, _), layer in self._layers.items() if its == kind)
            )
            for kind, found in self._devices.items()
            if kind in measured
        ]

    def _device(self, rank: int) -> DeviceProfile:
        info, kind = self._infos[rank], self._kind(rank)
        found, is_primary = self._devices[kind], not self._plan.is_worker(rank)
        return DeviceProfile(
            key=found.key,
            attention=found.attention,
            read_bytes_per_us=found.read_bytes_per_us,
            usable_bytes=int(info.free_memory * usable_share(info.device)),
            layer=self._layers[kind, layer_share(self._setup, rank)] if is_primary else None,
        )

    def _source(self, rank: int) -> str:
        """Where the numbers of a rank come from, for people."""
        needed: list[Part] = [(self._kind(rank), None)]
        if not self._plan.is_worker(rank):
            needed.append((self._kind(rank), layer_share(self._setup, rank)))
        sources = [self._sources[part] for part in needed if part in self._sources]
        own = [source.seconds for source in sources if source.rank == rank]
        if own:
            return f"measured in {sum(own):.1f} s"
        return f"as rank {sources[0].rank}" if sources else "cache"


def profile_key(info: DeviceInfo, setup: Setup) -> ProfileKey:
    """The properties of a rank that its attention's speed depends on: ranks with equal keys are measured once."""
    return ProfileKey(
        device=f"{info.name}, {plural(info.num_threads, 'thread')}" if info.device == "cpu" else info.name,
        driver=info.driver,
        dtype=setup.dtype,
        head_dim=setup.spec.head_dim,
        queries_per_group=setup.spec.queries_per_group,
        page_size=setup.block_size,
        backend=info.backend,
        enforce_eager=setup.enforce_eager,
        version=__version__,
    )


def layer_share(setup: Setup, rank: int) -> LayerShare:
    """A primary's share of each layer."""
    primary = setup.plan.primary(rank)
    return LayerShare(
        num_ranks=len(setup.plan.stage_of(primary).primaries),
        num_groups=primary.num_groups,
        num_weights=layer_weights(setup.spec, setup.plan, primary),
    )


# --- profiles from files ----------------------------------------------------------------------------------------------


def report_of(profile: FleetProfile, setup: Setup, name: str) -> ProfileReport:
    """The report of a profile from the file `name`.

    Raises ValueError where it lacks a rank or link of the plan, or was measured for another device, model or split.
    """
    lacking = _lacking(profile, setup.plan)
    if lacking:
        raise ValueError(
            f"profile {name} lacks {', '.join(lacking)}; run `hetis profile` with this plan, or leave out --profile."
        )
    for info in setup.fleet:
        different = _differences(profile.devices[info.rank], info, setup)
        if different:
            raise ValueError(
                f"profile {name} does not hold for rank {info.rank}: {', '.join(different)}; "
                f"run `hetis profile` with this model, plan and options, or leave out --profile."
            )
    devices = {info.rank: info.device for info in setup.fleet}
    return ProfileReport(profile=profile, sources=dict.fromkeys(devices, name), devices=devices)


def _lacking(profile: FleetProfile, plan: Plan) -> list[str]:
    devices, found = profile.devices, {(link.primary, link.worker) for link in profile.links}
    primaries = [primary.rank for primary in plan.primaries]
    links = [(home.rank, worker.rank) for home, worker in plan.links]
    return [
        *(f"rank {rank}" for rank in plan.ranks if rank not in devices),
        *(f"layers of rank {rank}" for rank in primaries if rank in devices and devices[rank].layer is None),
        *(f"link {home}->{worker}" for home, worker in links if (home, worker) not in found),
    ]


def _differences(device: DeviceProfile, info: DeviceInfo, setup: Setup) -> list[str]:
    """Differences between the rank that a profile was measured for and this one, in words."""
    pairs: list[tuple[msgspec.Struct, msgspec.Struct]] = [(device.key, profile_key(info, setup))]
    if device.layer is not None and not setup.plan.is_worker(info.rank):
        pairs.append((device.layer.share, layer_share(setup, info.rank)))
    return [
        f"its {field} is {getattr(there, field)} in the file and {getattr(here, field)} here"
        for there, here in pairs
        for field in here.__struct_fields__
        if getattr(there, field) != getattr(here, field)
    ]
