"""The built-in world: synthetic biographies, questions about them, and a meter of the knowledge a model holds.

After bioS of "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws" (Allen-Zhu and Li, arXiv
2404.05405), scaled down. Every value is one word of a small vocabulary (a date is three), so that a model of 0.1
million parameters spends most of them on facts and not on embeddings.
"""

from coppice.data.biographies.knowledge import (
    KNOWLEDGE,
    MeasuredKnowledge,
    knowledge_bits,
    knowledge_prompts,
    measure_knowledge,
)
from coppice.data.biographies.text import (
    ATTRIBUTES,
    SPLITS,
    TEMPLATES,
    Question,
    documents,
    questions,
    render,
    split_of,
    stream,
    tokenizer,
)
from coppice.data.biographies.world import Person, World

__all__ = [
    "ATTRIBUTES",
    "KNOWLEDGE",
    "SPLITS",
    "TEMPLATES",
    "MeasuredKnowledge",
    "Person",
    "Question",
    "World",
    "documents",
    "knowledge_bits",
    "knowledge_prompts",
    "measure_knowledge",
    "questions",
    "render",
    "split_of",
    "stream",
    "tokenizer",
]
