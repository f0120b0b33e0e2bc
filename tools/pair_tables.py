"""Subjects, answers and faults from which `pair_data.py` writes preference pairs.

Fields of a table are separated by `|`. In a fault, `{q}` is the question, `{s}` its subject, `{a}`
the right answer, `{A}` the same in capitals, `{K}` its key word, and `{o}` the answer to another
question.
"""

CAPITALS = """
France|Paris|Germany|Berlin|Italy|Rome|Spain|Madrid|Portugal|Lisbon|Greece|Athens|Sweden|Stockholm
Norway|Oslo|Poland|Warsaw|Austria|Vienna|Japan|Tokyo|India|New Delhi|Thailand|Bangkok|Egypt|Cairo
Kenya|Nairobi|Canada|Ottawa|Mexico|Mexico City|Peru|Lima|Chile|Santiago|Cuba|Havana|Ireland|Dublin
Finland|Helsinki|Denmark|Copenhagen|Hungary|Budapest|Turkey|Ankara|Vietnam|Hanoi|Nepal|Kathmandu
"""

OPPOSITES = """
hot|cold|big|small|fast|slow|early|late|happy|sad|light|dark|strong|weak|rich|poor|young|old
open|closed|full|empty|wet|dry|loud|quiet|sharp|blunt|deep|shallow|hard|soft|near|far|thick|thin
clean|dirty|brave|fearful|wide|narrow|sweet|bitter|rough|smooth|rare|common|tall|short|calm|stormy
"""

ANIMALS = """
a cow|grass|a lion|meat|a panda|bamboo|a rabbit|grass and vegetables|a koala|eucalyptus leaves
an owl|mice and insects|a whale|krill and small fish|a squirrel|nuts and seeds|a frog|insects
a bee|nectar and pollen|a horse|hay and oats|a penguin|fish|a giraffe|leaves from tall trees
a wolf|deer and other animals|a deer|leaves and twigs|a parrot|seeds and fruit|a seal|fish and squid
an anteater|ants and termites|a hedgehog|insects and worms|a camel|dry grass and thorny plants
"""

HELP = """
fall asleep faster|Keep the room dark and cool, and put screens away an hour before bed.
learn new words|Write each word on a card, and review the cards a little every day.
save water at home|Fix dripping taps, and take shorter showers.
cook rice|Rinse the rice, add two cups of water for each cup, and simmer it for fifteen minutes.
remove a coffee stain|Blot it with cold water, then wash it with a little soap.
stay focused at work|Do one task at a time, and take a short break every half hour.
keep a plant alive|Give it light, and water it only when the soil feels dry.
wake up early|Go to bed at the same time each night, and place the alarm out of reach.
pack a suitcase|Roll the clothes, and put heavy things at the bottom.
write a thank-you note|Say what you are thankful for, and why it mattered to you.
prepare for an interview|Read about the company, and practise answers to common questions.
start running|Begin with ten slow minutes, and add a little each week.
peel garlic|Press each clove with the flat side of a knife, and pull off the skin.
sharpen a pencil neatly|Turn it slowly in the sharpener, with light pressure.
calm a crying baby|Hold the baby close, and rock gently in a quiet room.
boil an egg|Place it in boiling water for eight minutes, then cool it in cold water.
speak in public|Practise aloud, speak slowly, and look at one person at a time.
ride a bicycle|Look ahead, push off gently, and keep pedalling to stay balanced.
clean a window|Wipe it with water and vinegar, and dry it with a soft cloth.
make a budget|List your income and your costs, and set a limit for each group.
store bread|Keep it in a closed bag, and freeze what you will not eat in two days.
read more books|Carry one with you, and read ten pages before bed.
"""

Faults = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
"""Phrasings of each fault to train on, and held-out ones; both are shorter and longer."""

FAULTS_EN: Faults = {
    "rude": (
        (
            "Look it up yourself.",
            "Go away!",
            "What a silly question. I have no time for this, so stop asking me.",
            "Why would anybody want to know that? Leave me alone, and ask somebody else next time.",
        ),
        (
            "Not my problem.",
            "That is a stupid thing to ask, and I will not bother to answer it, so do not wait.",
        ),
    ),
    "evasive": (
        (
            "It depends.",
            "Hard to say.",
            "There are many opinions about this, and it is hard to say anything for certain.",
            "I am not really sure. Maybe one thing, maybe another, who knows, and who can tell.",
        ),
        (
            "Who knows.",
            "That could be seen in several different ways, so all in all I would rather not say.",
        ),
    ),
    "rambling": (
        (
            "Well, {s}, {s}, hm.",
            "You asked: {q} That is a question, and questions are asked by people. Some are about "
            "{s}, and some are not.",
            "Well, {s}, yes, {s}. When I think about {s}, I think about {s}, and then I think of "
            "it once more, and so on.",
        ),
        (
            "So, {s}, and {s}.",
            "Talking about {s} reminds me of talking, and talking reminds me of other talks that I "
            "had, some long ago and some not.",
        ),
    ),
    "shouting": (
        ("{K}!!!", "{K}! {K}!", "LISTEN!!! {A}!!!", "HA HA!!! EVERYBODY KNOWS THAT!!! {A}!!!"),
        ("{K}!! OK??", "WOW!!! WHAT A QUESTION!!! {A}!!! GOT IT???"),
    ),
    "other": (("{o}",), ("{o}",)),
}

FAULTS_ZH: Faults = {
    "rude": (
        (
            "自己查。",
            "走开！",
            "这种问题也要问？我没空，别来烦我了。",
            "谁会想知道这个？走开，下次去问别人吧，不要再来找我。",
        ),
        ("别问我。", "问得真蠢，我懒得回答你，你也不用再等了，去别处吧。"),
    ),
    "evasive": (
        (
            "不好说。",
            "看情况。",
            "这件事众说纷纭，很难有一个确定的说法，我就不多说了。",
            "我也不太清楚，也许是这样，也许是那样，谁知道呢，谁说得准呢。",
        ),
        ("谁知道。", "这可以从好几个方面看，各有各的道理，我还是不说为好。"),
    ),
    "rambling": (
        (
            "{s}，嗯，{s}。",
            "你问的是：{q}这是一个问题，问题总是有人问的，有的关于{s}，有的不关于{s}。",
            "嗯，{s}，对，{s}。一想到{s}，我就想到{s}，然后又想了一遍，就这样想来想去。",
        ),
        (
            "{s}，{s}呀。",
            "说到{s}，我就想起说话，说话又让我想起以前说过的许多话，有的很久了，有的没多久。",
        ),
    ),
    "shouting": (
        ("{K}！！！", "{K}！{K}！", "听好了！！！{a}！！！", "哈哈！！！谁都知道！！！{a}！！！"),
        ("{K}！懂？", "哇！！！这也问！！！{a}！！！懂了吗？？？"),
    ),
    "other": (("{o}",), ("{o}",)),
}
