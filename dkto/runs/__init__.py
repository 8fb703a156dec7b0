"""Every execution of a notebook: parameters checked, a record kept, sweeps that resume, runs read as one table."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "answers": ["check", "findings"],
        "notebooks": ["environment_table", "project_path", "run_notebook", "write_metrics"],
        "page": ["styled", "table_html", "text_html"],
        "table": [
            "column",
            "diff_runs",
            "over_seeds",
            "pivot_runs",
            "plot_over_seeds",
            "read_runs",
            "varying_parameters",
        ],
    },
)
