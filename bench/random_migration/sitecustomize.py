"""Makes lanes migrate at random in some steps of a driver that bench_migration.py starts.

Python imports this module at start, because its folder is on PYTHONPATH; hetis itself has no hook for it.
"""

import os
import sys

VARIABLE = "HETIS_RANDOM_MIGRATION"  # "steps without migration,steps with it,lanes migrating at a time"


def migrate_at_random() -> None:
    from random import Random

    from hetis.core.placement import Move
    from hetis.engine.engine import Engine

    rest, moving, lanes = map(int, os.environ[VARIABLE].split(","))
    random = Random(0)
    plain = Engine._migrate

    def migrate(self: Engine, now: float) -> None:
        plain(self, now)
        if self._num_steps % (rest + moving) < rest:
            return
        plan, cache = self._setup.plan, self.cache
        free = [s for s in self.scheduler.running if not s.is_prefilling and not cache.is_moving(s.slot)]
        for sequence in random.sample(free, min(len(free), lanes - len(cache.transits()))):
            group = random.randrange(self._setup.spec.num_head_groups)
            source = cache.owners(sequence.slot)[0][group]
            target = random.choice([rank for rank in plan.ranks if rank != source])
            self.migrator.start([Move(slot=sequence.slot, stage=0, group=group, source=source, target=target)])

    Engine._migrate = migrate  # type: ignore[method-assign]


if VARIABLE in os.environ and "hetis.driver.driver" in sys.orig_argv:
    migrate_at_random()
