"""Agrees every second step only: the mean of the parameters."""

from dataclasses import dataclass

from benchsuite.sync import count
from benchsuite.update import Updater


@dataclass
class Strategy:
    """Averages parameters every so often."""

    every: int = 2
    """Steps between two means."""

    survives = "none"
    snapshot_of = "replica"
    clips_mean = False
    topologies = ("collective",)
    label = "My rare mean"
    short_label = "rare"
    colour = "#123456"
    refuses = (
        {
            "rule": "steps apart",
            "when": "every > 4",
            "reason": "every = {every} of {name}: replicas drift apart after 4 steps",
            "remedy": "set every = 2",
        },
    )

    def start(self, comm, part, recipe, topology, compression):
        self.comm = comm
        self.part = part
        self.recipe = recipe
        self.topology = topology
        self.compression = compression
        self.steps = recipe.budget // recipe.global_batch
        self.done = 0
        self.updater = Updater(part.params, recipe)
        self.events = {"means": 0}

    def next_index(self):
        if self.done == self.steps:
            return None
        return self.done, self.comm.rank, self.topology.num_workers

    def step(self, batch):
        loss = self.part.gradient(batch)
        self.updater.step(self.part.grad, samples=self.done * self.recipe.global_batch)
        self.done += 1
        if self.done % self.every == 0:
            self.compression.mean(self.part.params, self.topology)
            self.events["means"] += 1
        return loss

    def finish(self):
        pass

    def snapshot(self):
        return self.part.params

    def policy(self):
        return None

    def num_pushes(self):
        return 0

    def expected_events(self, num_batches, setting):
        return {"means": [num_batches // self.every] * setting.num_workers}

    def predicted_traffic(self, shapes, events, setting):
        one = setting.compression.predicted_traffic(
            shapes, setting.itemsize, setting.topology, num_workers=setting.num_workers
        )
        return one.times(count(events, "means", 0))
