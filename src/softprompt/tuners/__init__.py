"""Import paths of PEFT that documents name, such as ``softprompt.tuners.prompt_tuning.config``."""

import sys
from importlib import import_module
from types import ModuleType

_METHODS = {
    "cartridge": "cartridge",
    "cpt": "cpt",
    "multitask_prompt_tuning": "multitask",
    "p_tuning": "p_tuning",
    "prefix_tuning": "prefix",
    "prompt_tuning": "prompt_tuning",
}
"""PEFT's package of each method, and the file that has its configuration and module here."""

_OURS = "softprompt.prompts"
_CARTRIDGE_HELPERS = (
    "compose_cartridge_adapters",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "prompt_embeddings_from_past_key_values",
)

for _name, _file in _METHODS.items():
    _method = import_module(f"softprompt.prompts.methods.{_file}")
    _alias = ModuleType(f"{__name__}.{_name}", _method.__doc__)
    _own = [each for each in vars(_method).values() if getattr(each, "__module__", "").startswith(_OURS)]
    vars(_alias).update({each.__name__: each for each in _own if isinstance(each, type)})
    vars(_alias).update(config=_alias, model=_alias, utils=_alias)
    for _part in ("", ".config", ".model", ".utils"):
        sys.modules[f"{__name__}.{_name}{_part}"] = _alias
    globals()[_name] = _alias

_cartridge = sys.modules[f"{__name__}.cartridge"]
vars(_cartridge).update({name: getattr(import_module("softprompt"), name) for name in _CARTRIDGE_HELPERS})
