"""A Hugging Face config file or folder as a model to plan. Needs transformers; reads no weights."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from fabriclite.errors import ConfigError
from fabriclite.planning.models import Model, model_of


def model_from(path: str | Path) -> Model:
    """The model that a ``config.json``, or a folder that holds one, describes.

    It keeps no cache of keys and values, as training wants it. Which class it is: ``architectures`` says it, else a
    causal language model is taken if the type has one, else the bare model.

    Raises:
        ConfigError: transformers is missing, or there is no config that it knows.
    """
    config = _read(Path(path))
    config.use_cache = False
    config.dtype = None  # the precision decides
    make = _class_of(config)

    def build() -> nn.Module:
        return make(config)  # type: ignore[no-any-return]

    name = Path(path).stem if Path(path).is_file() else Path(path).resolve().name
    return model_of(build, name=config.model_type if name == "config" else name)


def _read(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"`--hf-config` must be a config.json or a folder that holds one, but {str(path)!r} is none of them."
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"`--hf-config` must be JSON, but {str(file)!r} is not: {error}.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ConfigError(
            f"`--hf-config` must say its `model_type`, as Hugging Face configs do, but {str(file)!r} does not."
        )
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ConfigError(
            f"`--hf-config` must find transformers, but: {error}. Run: pip install transformers"
        ) from error
    try:
        return AutoConfig.for_model(**raw)
    except ValueError as error:
        raise ConfigError(
            f"`--hf-config` must be of a type that transformers knows, but is {raw['model_type']!r}: {error}"
        ) from error


def _class_of(config: Any) -> Any:
    """What makes the model from its config."""
    import transformers
    from transformers.models.auto import modeling_auto

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found._from_config
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return modeling_auto.AutoModelForCausalLM.from_config
    return modeling_auto.AutoModel.from_config
