"""What every room stands on: files that are whole or absent, processes that end with their parent, the machine."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"files": ["read_records", "write_json"], "machine": ["hardware", "versions"]}
)
