"""The page *Teach a diffusion model your taste*: the small world draws and trains inside a browser tab.

`export` turns the model into graphs without weights, over one `blob` of weights that all share;
`page` puts graphs, weights and scripts into one HTML file.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "blob": ["Layout", "read_layout", "weights_of", "wire_bytes"],
        "lora": ["LoraLayer", "flat_lora", "lora_layers"],
        "page": ["build_page", "prompt_pools"],
        "runtime": ["package_file"],
    },
)
