"""Where the weights of a network come from; a card and a configuration say no more than this."""

from dataclasses import dataclass
from typing import Optional

from torch import nn


@dataclass(frozen=True)
class Provenance:
    """What is known of a network's weights. A model of the zoo has it as ``model.provenance``.

    Attributes:
        from_scratch: whether the zoo loaded no weights. What timm publishes of its own (license, tag, origin) does not
            hold for such a network.
        repo_id: the repository on the Hub that the weights were loaded from, with ``@revision`` if one was named; None
            for a folder, a file, or no weights.
    """

    from_scratch: bool
    repo_id: Optional[str] = None


def provenance_of(model: nn.Module) -> Optional[Provenance]:
    """Return what the zoo noted when it built a model; None for a model that something else built."""
    noted = getattr(model, "provenance", None)
    return noted if isinstance(noted, Provenance) else None
