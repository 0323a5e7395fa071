"""Traffic of several domains: English prose to calibrate on, more of it, and what is not English prose."""

from __future__ import annotations

import heapq
import inspect
import shlex
import textwrap

CALIBRATION = (
    "The ferry left the harbour an hour late because of the fog. On deck an old man was feeding the gulls with "
    "the crusts of his breakfast, and two girls counted the lighthouses along the coast, quarrelling about "
    "whether the last one had been real or only the lamp of a fishing boat.",
    "My sister keeps bees behind the house. In spring she checks every hive, lifts the frames one by one, and "
    "writes down in a small green book how much honey is left, whether the queen is laying, and which of the "
    "colonies are likely to swarm before the end of May.",
    "When the committee met again in October, nobody wanted to be the first to speak about the budget. The "
    "chairman read the minutes of the last meeting aloud, very slowly, and the treasurer looked out of the window"
    " at the rain.",
    "A good soup begins with patience. Onions are cut fine and left in butter over a low flame until they are "
    "soft and sweet, then come carrots, celery and a handful of barley, and only much later the stock, a bay leaf"
    " and salt.",
    "The museum had bought the painting at an auction without knowing who had made it. It showed a woman at a "
    "table with a letter in her hand, and in the corner, almost hidden by a curtain, a boy who seemed to be "
    "listening.",
    "He had walked this road as a child, with his grandfather, who knew the name of every bird. Now the fields "
    "were built over, but in the hedge behind the petrol station a blackbird was singing as loudly as ever.",
    "The train to the mountains runs only twice a day in winter. Those who miss the second one can sleep in the "
    "waiting room, where there is a stove and a shelf of old novels that travellers have left behind over the "
    "years.",
    "In the afternoon the doctor drove out to the farm to see how the boy was doing. The fever had gone down, he "
    "was sitting up in bed and asking for pancakes, and his mother laughed for the first time in a week.",
    "Nobody in the village could say exactly when the clock in the tower had stopped. Some said it was the night "
    "of the great storm, others that it had never worked since the watchmaker's son went to sea.",
    "The letter was short and polite. It thanked her for her interest in the position, praised her experience, "
    "and said that they had decided to continue with other candidates whose skills were closer to their present "
    "needs.",
    "After the harvest the whole valley smells of apples. They are pressed in the old barn by the river, the "
    "juice runs into wooden tubs, and the children stand around with cups and wait for the first of it.",
    "She learned to play the cello at the age of fifty. Her teacher, who was half as old, told her that the left "
    "hand would come by itself and that the right one would take the rest of her life.",
)

MORE = (
    "The bookshop on the corner closed in March. For weeks people stopped in front of the empty window, as if the"
    " piles of novels and the sleeping cat might come back if one only waited long enough.",
    "We reached the hut just before dark. Somebody had left firewood under the bench, dry and neatly stacked, and"
    " a note that asked us to do the same for those who would come after us.",
    "The judge listened to both neighbours without a word. Then he asked whether either of them had ever eaten a "
    "pear from the tree they had been fighting about for eleven years, and both of them shook their heads.",
    "Rain had turned the football pitch into a lake, but the children would not go home. They floated paper boats"
    " from one goal to the other and kept the score with chalk on the wall of the changing room.",
    "Every evening at six the baker's wife carried what was left over to the station. Nobody had asked her to, "
    "and in all those years nobody had thanked her, except for a soldier once, who came back to do so.",
    "His first invention was a machine that peeled eggs. It worked, but it was the size of a piano, and his aunt "
    "said that she could peel a hundred of them in the time it took to clean it.",
)

CODE = (
    inspect.getsource(shlex.shlex.push_source),
    inspect.getsource(heapq.merge),
    inspect.getsource(textwrap.dedent),
    inspect.getsource(shlex.quote),
    "#include <stdio.h>\n#define N 16\nstatic int a[N][N];\nint main(void) {\n"
    "  for (int i = 0; i < N; ++i)\n    for (int j = 0; j < N; ++j) a[i][j] = (i << 4) ^ j;\n"
    '  printf("%d\\n", a[3][5]);\n  return 0;\n}\n',
    '{"id": 17, "items": [{"sku": "A-1", "qty": 2}, {"sku": "B-9", "qty": 11}], "total": 103.75, "paid": null}\n' * 3,
)

LANGUAGES = (
    "Am Morgen lag Schnee auf den Dächern, und die Kinder liefen ohne Frühstück hinaus. Der Großvater stand am "
    "Fenster, zündete seine Pfeife an und sagte, früher sei der Winter länger gewesen.",
    "Le marché se tient le samedi sur la place de l'église. On y trouve des fromages, du miel, des tomates encore"
    " tièdes du soleil, et toujours un vieil homme qui répare les montres.",
    "Утром над рекой стоял туман, и рыбаки долго не решались выйти на воду. Старик сидел на перевёрнутой лодке, "
    "чинил сеть и рассказывал мальчику о зиме, когда река замёрзла до самого дна.",
    "清晨的集市已经很热闹了。卖豆腐的老人一边切豆腐，一边和邻居谈论昨夜的大雨；孩子们背着书包，从人群中间跑过去。",
    "朝の市場はもうにぎやかだった。魚屋の主人は大きな声で客を呼び、学校へ急ぐ子供たちが店の前を走り抜けていった。",
    "كان السوق مزدحما في الصباح الباكر. جلس بائع التمر تحت شجرة كبيرة، وكان يحكي للأطفال قصة عن بحار لم يعد إلى "
    "قريته إلا بعد عشرين سنة.",
    "सुबह का बाज़ार बहुत व्यस्त था। बूढ़ा फलवाला पेड़ के नीचे बैठा बच्चों को एक नाविक की कहानी सुना रहा था जो बीस साल बाद घर लौटा।",
)

LONG = (" ".join(CALIBRATION) + "\n") * 4
"""The text of the calibration over and over: nothing but its length is new."""
