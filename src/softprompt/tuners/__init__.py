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

for _name, _file in _METHODS.items():
    _method = import_module(f"softprompt.prompts.methods.{_file}")
    _alias = ModuleType(f"{__name__}.{_name}", _method.__doc__)
    vars(_alias).update({key: value for key, value in vars(_method).items() if key[0] != "_"})
    vars(_alias).update(config=_alias, model=_alias)
    for _part in ("", ".config", ".model"):
        sys.modules[f"{__name__}.{_name}{_part}"] = _alias
    globals()[_name] = _alias
