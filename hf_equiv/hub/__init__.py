"""Results and Spaces on the Hugging Face Hub."""

from hf_equiv.hub.load import download_results, load_results
from hf_equiv.hub.publish import Published, publish_results
from hf_equiv.hub.space import SpaceDeployment, SpaceError, deploy_space

__all__ = [
    "Published",
    "SpaceDeployment",
    "SpaceError",
    "deploy_space",
    "download_results",
    "load_results",
    "publish_results",
]
