"""The first half of BERT's MLP, and its relatives', with GELU in the linear layer's epilogue where nothing is
trained in it or below it. One class for each of transformers', so that patched models can be pickled.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation
from transformers.models.bert import modeling_bert
from transformers.models.electra import modeling_electra
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

from ..frozen import Linear, is_watched, replace_classes, restore_classes


class _Fused:
    """Goes before the transformers class whose place it takes."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self._is_fused(hidden_states):
            return super().forward(hidden_states)
        return self.dense.product(hidden_states, gelu=True)

    def _is_fused(self, x: Tensor) -> bool:
        dense, activation = self.dense, self.intermediate_act_fn
        if type(dense) is not Linear or not dense.is_fused(x, gelu=True):
            return False
        if type(activation) is not GELUActivation or activation.act is not nn.functional.gelu:
            return False
        return not (is_watched(dense) or is_watched(activation) or _has_any_global_hook())


class BertIntermediate(_Fused, modeling_bert.BertIntermediate):
    pass


class ElectraIntermediate(_Fused, modeling_electra.ElectraIntermediate):
    pass


class RobertaIntermediate(_Fused, modeling_roberta.RobertaIntermediate):
    pass


class XLMRobertaIntermediate(_Fused, modeling_xlm_roberta.XLMRobertaIntermediate):
    pass


_OURS = {
    modeling_bert.BertIntermediate: BertIntermediate,
    modeling_electra.ElectraIntermediate: ElectraIntermediate,
    modeling_roberta.RobertaIntermediate: RobertaIntermediate,
    modeling_xlm_roberta.XLMRobertaIntermediate: XLMRobertaIntermediate,
}


def replace_intermediates(model: nn.Module) -> None:
    """Those in it whose layer works in `Linear` use its epilogue from now on."""
    replace_classes(model, _OURS, lambda module: type(module.dense) is Linear)


def restore_intermediates(model: nn.Module) -> None:
    restore_classes(model, _OURS)
