"""Half precision of values that are cut off first, so that no sum is infinite."""

from dataclasses import dataclass

from benchsuite.compression import fp16


@dataclass
class Compression(fp16.Compression):
    """Casts to torch.float16 what is at most `limit`."""

    limit: float = 1000.0
    """The largest absolute value that is sent."""

    label = "My half"
    refuses = (
        {
            "rule": "cut off",
            "when": "limit * cell.replicas > 65504",
            "reason": "{cell.replicas} values of {limit:g} may add up to infinity in {name}",
            "remedy": "set limit = 1000",
        },
    )

    def mean(self, flat, topology):
        flat.clamp_(-self.limit, self.limit)
        super().mean(flat, topology)
