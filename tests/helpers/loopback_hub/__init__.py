"""A loopback stand-in for the Hugging Face Hub: the real client over real HTTP, with no network.

- ``server``: speaks the protocol.
- ``repositories``: what it serves: repositories on disk, with commits, branches, owners.
- ``faults``: how it misbehaves on demand.
- ``static_timm``: repositories of timm's static models, made when first asked for.

The client reads ``HF_ENDPOINT`` when it is imported: start the server and set the variable before.
"""

from tests.helpers.loopback_hub.faults import Fault
from tests.helpers.loopback_hub.repositories import DiskRepositories, HubFile, Repositories, User
from tests.helpers.loopback_hub.server import HubServer, Request
from tests.helpers.loopback_hub.static_timm import StaticTimmModels

__all__ = ["DiskRepositories", "Fault", "HubFile", "HubServer", "Repositories", "Request", "StaticTimmModels", "User"]
