"""A language model whose replies are functions of the messages."""


class ScriptedGenerator:
    """Replies by the first rule whose key occurs in the system message.

    Attributes:
        seen: the messages of all calls.
    """

    max_prompt_tokens = 2000
    is_small = False

    def __init__(self, rules):
        self.rules, self.seen = rules, []

    def reply(self, messages, max_tokens):
        self.seen.append(messages)
        system, user = messages[0]["content"], messages[-1]["content"]
        for key, rule in self.rules.items():
            if key in system:
                return rule(user) if callable(rule) else rule
        return ""

    def mean_logprob(self, prompt, text):
        return len(set(prompt.split()) & set(text.split())) / 10

    def count(self, text):
        return len(text.split())
