"""Built-in prompts: a few of each kind, to see where routers spend, and those whose answers are shown.

They are written for this purpose and belong to no data set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynadepth.tuning.formats import encode_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"
"""The kind that is set in the tokenizer's chat template; others are continued as they are."""

KINDS: dict[str, tuple[str, ...]] = {
    CHAT: (
        "Why is the sky blue?",
        "Give me three tips for sleeping better.",
        "Write a short thank-you note to a colleague who helped me move house.",
        "What should I pack for a weekend of hiking in the rain?",
    ),
    "plain text": (
        "The harbour lay still under the morning fog. Two fishing boats had come in before dawn, and their crews were "
        "already mending nets on the quay when the baker opened his shutters and",
        "Glaciers form where more snow falls in winter than melts in summer. Over centuries the lower layers are "
        "pressed into ice, which begins to flow downhill under its own weight,",
        "My grandmother kept a tin of buttons on the highest shelf of the kitchen. When it rained we were allowed to "
        "take it down and sort them by colour, and she told us which coat each had come from.",
        "The committee met on Tuesday to discuss the new timetable. Several members pointed out that the last bus now "
        "leaves before the evening classes end, and asked",
    ),
    "code": (
        'def reverse_words(text: str) -> str:\n    """Returns the words of `text` in reverse order."""\n    words = '
        "text.split()\n    return",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        "
        "self.items.append(item)\n\n    def pop(self):\n",
        "SELECT customers.name, SUM(orders.total)\nFROM customers\nJOIN orders ON orders.customer_id = customers.id\n"
        "WHERE orders.created_at >= '2024-01-01'\nGROUP BY",
        "for (let i = 0; i < rows.length; i++) {\n  const cells = rows[i].split(',');\n  if (cells.length < 3) {\n    "
        "continue;\n  }\n  totals[cells[0]] =",
    ),
    "maths": (
        "Question: A shop sells pencils in boxes of 12. Maria buys 5 boxes and gives 17 pencils away. How many pencils "
        "does she have left?\nAnswer:",
        "Question: A train travels 180 kilometres in 2 hours and then 150 kilometres in 3 hours. What is its average "
        "speed?\nAnswer:",
        "Question: If 3x + 7 = 25, what is x?\nAnswer:",
        "Question: A garden is 8 metres long and 5 metres wide. How many metres of fence does it need?\nAnswer:",
    ),
    "multiple choice": (
        "Which of these is a mammal?\nA. trout\nB. eagle\nC. whale\nD. lizard\nAnswer:",
        "What do plants take from the air to make sugar?\nA. carbon dioxide\nB. helium\nC. oxygen\nD. neon\nAnswer:",
        "Which planet is closest to the sun?\nA. Mars\nB. Mercury\nC. Jupiter\nD. Saturn\nAnswer:",
        "What is the capital of Italy?\nA. Milan\nB. Turin\nC. Rome\nD. Naples\nAnswer:",
    ),
}

SAMPLES = (
    "Why is the sky blue?",
    "Give me three tips for sleeping better.",
    "Write a Python function that reverses a string.",
    "A shop sells pencils in boxes of 12. Maria buys 5 boxes. How many pencils does she have?",
)


def encoded(kind: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts of a kind."""
    if kind == CHAT:
        return [encode_chat(tokenizer, prompt) for prompt in KINDS[kind]]
    return [list(tokenizer(prompt, verbose=False)["input_ids"]) for prompt in KINDS[kind]]
