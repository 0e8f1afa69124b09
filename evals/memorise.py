import re
import numpy as np

def strip_thinking(text: str) -> str:
    text = re.sub(r"^\s*<think>.*?</think>", "", text, count=1, flags=re.S)
    before, closed, after = text.partition("</think>")
    return (after if closed and "<think>" not in before else text).strip()

def common_prefix(a, b):
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))

def common_span(a, b):
    ours = np.array(b, dtype=np.int64)
    ends = np.zeros(len(b) + 1, dtype=np.int64)
    best = (0, 0, 0)
    for i, token in enumerate(a):
        ends[1:] = np.where(ours == token, ends[:-1] + 1, 0)
        if len(b) and (size := int(ends.max())) > best[0]:
            best = (size, i + 1 - size, int(ends.argmax()) - size)
    return best
