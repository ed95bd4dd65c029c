"""fastattn inside Hugging Face transformers.

Importing this module registers the name "fastattn" with transformers, so that
`AutoModel.from_pretrained(name, attn_implementation="fastattn")` computes attention here. `patch(model)` does
that for a model in memory and runs its encoder without padding as well; `unpatch(model)` takes everything
back.
"""

from ..errors import MissingDependencyError
from .versions import TRANSFORMERS, check_version

try:
    import transformers as _transformers

    check_version(_transformers.__version__)
except ImportError as error:
    raise MissingDependencyError(TRANSFORMERS, "hf") from error

from .explain import ModelExplanation, explain
from .interface import register
from .patch import patch, patched, unpatch
from .shared_prompt import SharedPrompt

__all__ = ["ModelExplanation", "SharedPrompt", "explain", "patch", "patched", "unpatch"]

register()
