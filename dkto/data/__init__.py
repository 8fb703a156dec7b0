"""From likes to rows on disk: read any source into a `FeedbackTable`, encode it once, draw rows from it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "encode": ["prepare_feedback", "shuffle_prepared"],
        "encoded": ["PreparedFeedback"],
        "feedback": ["FeedbackTable", "describe_feedback", "make_feedback", "read_feedback", "write_feedback"],
        "images": ["load_image"],
        "pairs": ["convert_pairs"],
        "prompts": ["check_disjoint", "load_prompts"],
        "sampler": ["BiasedSampler"],
        "votes": ["PAPER_COUNTS", "PARTITIONS", "likes_from_votes"],
    },
)
