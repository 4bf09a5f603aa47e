"""Native support for model type `deepseek` (DeepSeek-MoE-16B), without its remote code.

transformers has no class for it, and the hub's own code no longer imports. Its backbone is, part
for part, the text backbone of DeepSeek-OCR-2, so a config and a language-model head are enough.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextModel,
    DeepseekOcr2TextPreTrainedModel,
)

from camera.runtime.errors import CameraError


class DeepseekConfig(DeepseekOcr2TextConfig):
    """Configuration of DeepSeek-MoE, in the field names of the hub's config.json."""

    model_type = "deepseek"
    base_config_key = ""
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.mlp_layer_types is None:
            self.mlp_layer_types = [
                "sparse"
                if i >= self.first_k_dense_replace and i % self.moe_layer_freq == 0
                else "dense"
                for i in range(self.num_hidden_layers)
            ]
        if self.norm_topk_prob or self.scoring_func != "softmax":
            raise CameraError(
                "config.json: a 'deepseek' model with norm_topk_prob=true or a scoring_func other "
                "than softmax is not supported."
            )


class DeepseekForCausalLM(DeepseekOcr2TextPreTrainedModel, GenerationMixin):
    """DeepSeek-MoE with its language-model head."""

    config_class = DeepseekConfig
    config: DeepseekConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # transformers looks for its experts decorator in the source of this module, where it isn't
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.model = DeepseekOcr2TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """The usual causal language model forward."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        wanted = logits_to_keep
        if isinstance(logits_to_keep, int):
            wanted = slice(-logits_to_keep or None, None)
        logits = self.lm_head(outputs.last_hidden_state[:, wanted])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def register() -> None:
    """Make transformers' Auto classes know `deepseek`."""
    AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    register_checkpoint_conversion_mapping(
        "deepseek", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
    )
