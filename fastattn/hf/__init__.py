"""fastattn inside Hugging Face transformers.

Importing this module registers the name "fastattn" with transformers, so that
`AutoModel.from_pretrained(name, attn_implementation="fastattn")` computes attention here. `patch(model)` does
that for a model in memory and runs its encoder without padding as well; `unpatch(model)` takes everything
back.
"""

from ..errors import MissingDependencyError

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise MissingDependencyError("transformers", "hf") from error

from .explain import ModelExplanation, explain
from .interface import register
from .patch import patch, patched, unpatch
from .shared_prompt import SharedPrompt

__all__ = ["ModelExplanation", "SharedPrompt", "explain", "patch", "patched", "unpatch"]

register()
