"""Twenty texts for comparing greedy continuations of two element types.

They are of the kind a coding assistant goes on with, and such that the models are sure of most
tokens. Where the best two tokens of a float32 run are within a few hundredths of a logit, rounding
the weights to bfloat16 turns the choice, whatever the kernels do; texts that hang on such a choice
early on say nothing about an implementation and are left out.
"""

__all__ = ["PROMPTS"]

PROMPTS = (
    "months = ['January', 'February', 'March',",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\nimport sys\nimport json\n\ndef main():\n    with open(sys.argv[1]) as f:\n",
    "for i in range(10):\n    print(i)\n\nfor i in range(20):\n    print(i)\n\n"
    "for i in range(30):\n",
    "SELECT id, name FROM users WHERE id = 1;\nSELECT id, name FROM users WHERE id = 2;\nSELECT",
    '{"name": "a", "value": 1}\n{"name": "b", "value": 2}\n{"name": "c", "value": 3}\n',
    "x = 1\nx = x + 1\nx = x + 1\nx = x + 1\n",
    "The days of the week are Monday, Tuesday, Wednesday,",
    "2 4 6 8 10 12 14 16 18 20 22 24",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return a - b\n\n"
    "def multiply(a, b):\n",
    "<ul>\n  <li>one</li>\n  <li>two</li>\n  <li>three</li>\n",
    "git add .\ngit commit -m 'first'\ngit push\ngit add .\ngit commit -m 'second'\ngit push\n",
    "self.a = a\nself.b = b\nself.c = c\nself.d = d\n",
    "if x == 1:\n    return 'one'\nelif x == 2:\n    return 'two'\nelif x == 3:\n",
    "January 31\nFebruary 28\nMarch 31\nApril 30\nMay 31\n",
    "1 + 1 = 2\n1 + 2 = 3\n1 + 3 = 4\n1 + 4 = 5\n",
    "def one():\n    return 1\n\ndef two():\n    return 2\n\ndef three():\n    return 3\n\n",
    "line 1\nline 2\nline 3\nline 4\nline 5\n",
    "[1, 2, 3]\n[4, 5, 6]\n[7, 8, 9]\n[10, 11, 12]\n",
)
