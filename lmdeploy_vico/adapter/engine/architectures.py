"""Names under which LMDeploy's engine finds our classes; imports nothing of LMDeploy, being read while that is."""

PREFIX = 'Vico'
CHAT_MODEL_MODULE = 'lmdeploy_vico.adapter.engine.chat_model'


def vico_architecture(language_model: str) -> str:
    """The architecture of a ViCO checkpoint whose language model is LMDeploy's class ``language_model``."""
    return f'{PREFIX}{language_model}'


def add_chat_models(module_map: dict[str, str], custom_module_map: dict[str, str]) -> None:
    """Enter ``VicoX`` for every architecture X of LMDeploy's; the classes are made when they are looked up."""
    for language_model in module_map:
        name = vico_architecture(language_model)
        custom_module_map[name] = f'{CHAT_MODEL_MODULE}.{name}'
