"""Random JSON schemas of the kind that people write, from a seed."""

import random

NAMES = (
    *("name", "age", "city", "tags", "kind", "price", "email", "created_at", "id", "items"),
    *("姓名", "城市", "标签", "a/b", "x y", 'q"t', "naïve", "isActive", "note", "score"),
)
WORDS = (
    "red",
    "green",
    "blue",
    "北京",
    "上海",
    "naïve",
    "two words",
    'a"b',
    "back\\slash",
    "",
    "ß",
)
PATTERNS = (
    *(r"^\d{3}-\d{4}$", "^[A-Z]{2,4}$", "^[a-z]+[0-9]?$", r"^(foo|bar|baz)$", r"^\w{1,8}$"),
    *("^[一-龥]{2,4}$", r"^v\d+\.\d+$", "[0-9]", r"^#[0-9a-fA-F]{6}$", r"^\S{1,6}$"),
)
FORMATS = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "duration")


def random_schema(seed):
    """Returns a schema that some value satisfies; its lists and texts are bounded."""
    made = _Maker(random.Random(seed))
    schema = made.object(depth=0)
    if made.definitions:
        schema["$defs"] = made.definitions
    if made.rng.random() < 0.2:
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


class _Maker:
    def __init__(self, rng):
        self.rng, self.definitions = rng, {}

    def any(self, depth):
        simple = [self.string, self.string, self.integer, self.number, self.boolean, self.enum]
        nested = [self.object, self.array, self.union, self.one_of, self.reference]
        rng = self.rng
        make = rng.choice(simple if depth > 2 or rng.random() < 0.55 else nested)
        schema = make(depth + 1)
        if rng.random() < 0.2:
            schema["description"] = rng.choice(WORDS)
        if rng.random() < 0.1:
            schema["title"] = rng.choice(NAMES)
        return schema

    def object(self, depth):
        rng = self.rng
        names = rng.sample(NAMES, rng.randint(1, 4))
        schema = {
            "type": "object",
            "properties": {name: self.any(depth) for name in names},
            "required": [name for name in names if rng.random() < 0.6],
            "additionalProperties": False,
        }
        if not schema["required"] and rng.random() < 0.5:
            del schema["required"]
        elif rng.random() < 0.1:
            schema["minProperties"] = 1 if schema["required"] == names else 0
        return schema

    def array(self, depth):
        least = self.rng.randint(0, 2)
        schema = {"type": "array", "minItems": least, "maxItems": least + self.rng.randint(0, 2)}
        if self.rng.random() < 0.2:
            return {
                "type": "array",
                "prefixItems": [self.any(depth), self.any(depth)],
                "items": False,
                "minItems": 2,
            }
        return {**schema, "items": self.any(depth)}

    def string(self, depth):
        rng, kind = self.rng, self.rng.random()
        if kind < 0.25:
            return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 12}
        if kind < 0.45:
            return {"type": "string", "format": rng.choice(FORMATS)}
        if kind < 0.55:
            return {"const": rng.choice(WORDS)}
        least = rng.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(1, 12)}

    def integer(self, depth):
        rng = self.rng
        low = rng.choice([-1000, -5, 0, 1, 18])
        schema = {"type": "integer"}
        if rng.random() < 0.7:
            schema["minimum"] = low
        if rng.random() < 0.5:
            schema["exclusiveMaximum"] = low + rng.choice([3, 100, 10**9])
        if rng.random() < 0.2:
            schema["multipleOf"] = rng.choice([2, 3, 5])
            schema.pop("exclusiveMaximum", None)
        return schema

    def number(self, depth):
        rng = self.rng
        low = rng.choice([-1.5, 0, 0.1, 3])
        bounds = [
            {"minimum": low, "maximum": low + rng.choice([0.5, 10, 1e6])},
            {"exclusiveMinimum": low, "exclusiveMaximum": low + rng.choice([0.5, 7, 1e6])},
            {"minimum": 0, "maximum": 100, "multipleOf": 0.5},
        ]
        return {"type": "number", **rng.choice(bounds)}

    def boolean(self, depth):
        return self.rng.choice(
            [{"type": "boolean"}, {"const": True}, {"type": "null"}, {"type": ["boolean", "null"]}]
        )

    def enum(self, depth):
        values = [*WORDS, 1, 2.5, -3, None, True, [1, "x"], {"k": "值"}]
        return {"enum": self.rng.sample(values, self.rng.randint(1, 4))}

    def union(self, depth):
        return {"anyOf": [self.any(depth) for _ in range(self.rng.randint(2, 3))]}

    def one_of(self, depth):
        options = []
        for kind in self.rng.sample(["cat", "dog", "鱼"], 2):
            option = self.object(depth)
            option["properties"] = {"type": {"const": kind}} | option["properties"]
            option["required"] = ["type", *option.get("required", [])]
            name = f"{kind}{len(self.definitions)}"
            self.definitions[name] = option
            options.append({"$ref": f"#/$defs/{name}"})
        return {"oneOf": options}

    def reference(self, depth):
        if self.definitions and self.rng.random() < 0.5:
            return {"$ref": f"#/$defs/{self.rng.choice(list(self.definitions))}"}
        name = f"Def{len(self.definitions)}"
        self.definitions[name] = {}
        self.definitions[name] = self.any(3)
        return {"$ref": f"#/$defs/{name}"}
