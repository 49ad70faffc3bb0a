"""The text that certificates are made with, unless another is given.

Written for this purpose: plain prose, dialogue, numbers, lists, code, tables, several scripts and emoji, so that common and rare
tokens, long words and single bytes all occur. To change it is to make certificates incomparable; `gemcutter verify --text` takes
another text instead.
"""

from __future__ import annotations

PASSAGE = """\
The lamp room at the top of the tower was never quite dark. Even at noon, when the shutters were closed against
the glare, a thin line of light crept along the brass rail and rested on the logbook. Marta liked to read the
old entries there. Her predecessor had written about the weather first, then about ships, and only then, in
smaller letters, about himself.

"Wind from the north-west, force six, rising," she read aloud. "Two colliers and a packet boat before dawn. The
third lens is loose again and hums in B flat."

"Does it still hum?" asked the boy. He had carried the oil up all one hundred and twelve steps and was proud of
it.

"Only when nobody listens. Sit down, and I will tell you how the mechanism works, because one day you will have
to mend it without me."

She explained that a weight of 140 kilograms sinks through the shaft in seven hours, and that its fall turns the
lens once every 48 seconds. If the shaft is 16.8 metres deep, then the weight sinks 2.4 metres an hour, or 4
centimetres a minute. The boy counted on his fingers, frowned, and found that she was right: 16.8 / 7 = 2.4, and
240 / 60 = 4.

Before a keeper lights the lamp, three things are done in this order:

1. Wipe the chimney with a dry cloth; a wet one cracks the glass.
2. Trim both wicks to 3 mm, never less.
3. Wind the clockwork, count the turns (there are 96), and write the number down.

| night | turns | oil (l) | remarks |
|-------|-------|---------|---------------------|
| Mon | 96 | 4.25 | fog until 03:10 |
| Tue | 95 | 4.50 | chain slipped once |
| Wed | 96 | 4.10 | clear, many stars |

Years later the boy, by then an engineer, replaced the clockwork with a controller the size of a matchbox. Its
program was short:

```python
def angle(seconds: float, period: float = 48.0) -> float:
    \"\"\"Give the lens's angle in degrees, from 0 up to 360.\"\"\"
    turns = seconds / period
    return 360.0 * (turns - int(turns))

for second in range(0, 49, 12):
    print(f"{second:>3} s -> {angle(second):6.1f} deg")
```

He kept the settings in a file, {"period_s": 48, "lamp": {"kind": "LED", "watts": 35.5}, "fog_horn": null,
"names": ["Marta", "Jun"]}, and the file in a drawer, next to the logbook. Visitors came from everywhere and
left their sentences in it. A sailor from Hamburg: "Wer nachts ein Licht sieht, der ist nicht mehr allein auf
dem Wasser." A teacher from Lyon: « La lumière ne pèse rien, et pourtant elle nous porte. » Una niña de Cádiz
escribió: ¿quién enciende el sol por la mañana? Someone from Kyoto added 灯台の光は遠くまで届く。 and drew a small wave; a
couple from Kraków wrote „Światło wraca co czterdzieści osiem sekund”, and a captain from Odesa: Море пам'ятає
кожен вогник. There is a line in Greek, το φως ταξιδεύει, one in Arabic, الضوء لا ينام, one in Hindi, दीपक जलता
रहा, one in Korean, 등대는 기다린다, and a row of pictures without any words at all: 🌊🌊⛵🌙✨.

What is a lighthouse for, now that every ship knows its position to within a few metres? The engineer thought
about it often. A satellite answers the question "where am I?", but the lamp answers another one, older and
harder to put into numbers: "is anybody there?" An answer of that kind can't be computed in advance. It has to
be given every night, and it has to be given on time.

On the last page of the logbook there is a calculation in pencil. If the lamp turns once in 48 seconds, it turns
75 times an hour, 1,800 times a day and 657,000 times in a year of 365 days. Below it, in the small letters of
the first keeper, stands a single remark: "Not one of these was the same as the one before." Whoever reads it
usually closes the book, looks up, and waits for the beam to come round again.
"""
