"""Texts that tokenizers disagree about."""

_PLAIN = """
a photo of a cat
A Photo Of A CAT
an astronaut riding a horse on mars, 8k, highly detailed, trending on artstation
masterpiece, best quality, 1girl, solo, looking at viewer
don't can't won't it's they're we've I'll you'd y'all o'clock rock'n'roll
DON'T CAN'T IT'S
the '90s and the 1980's
'quoted' "double" `backtick`
3.14159 2,718 1e-5 100% $5 €7 £9 ¥1
1234567890 12 34 0x1F 4k 8K
Nº5 ½ ⅓ x² H₂O ١٢٣ ४५६ 七八九 Ⅳ ①
hello!!! what??? wait... no—yes – ok
a-b_c+d=e/f\\g|h
(parentheses) [brackets] {braces} <angle>
((masterpiece:1.3)), [bad:0.5], (a:b), \\(escaped\\)
e-mail: someone@example.com #hashtag @mention
http://example.com/path?query=1&other=2#frag
&amp; &lt;b&gt; &quot;x&quot; &#39; &nbsp; &eacute; &#233;
&amp;amp; AT&T R&D
<b>bold</b> <br/>
<|startoftext|> inside
inside <|endoftext|> the text
<|STARTOFTEXT|> <|EndOfText|>
<|endoftext|><|endoftext|>
a<|startoftext|>b
<lora:name:0.8>
!
!!
!!!!!!!!!!!!!!!!
wow! such! excitement!
? ! ? !
.
,
...
…
--
—
'
''
'''
's
's 't 're 've 'm 'll 'd
x's x't x're
's's's
"
`
~
^
a
I
O
x y z
ab
supercalifragilisticexpialidocious
pneumonoultramicroscopicsilicovolcanoconiosis
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
hahahahahahahahaha
camelCaseAndPascalCase snake_case kebab-case
iPhone 15 Pro Max
C++ C# F# .NET node.js
U.S.A. e.g. i.e. etc.
Mr. & Mrs. Smith
café
café naïve façade résumé
CAFÉ NAÏVE
Ångström Ångström Å
ﬁ ﬂ ﬀ ligatures
ﬀﬁﬂ
ß straße STRASSE ẞ
İstanbul ıspanak I ı
ΑΒΓ αβγ ς σ Σ
ΌΔΥΣΣΕΎΣ
Москва МОСКВА
Привет, как дела?
Україна їжак ґанок
שלום עולם
שָׁלוֹם
مرحبا بالعالم
مَرْحَبًا
سلام دنیا
नमस्ते दुनिया
हिन्दी में लिखा
বাংলা ভাষা
தமிழ் மொழி
తెలుగు
ಕನ್ನಡ
മലയാളം
ไทย ภาษาไทย
ລາວ
မြန်မာ
ភាសាខ្មែរ
ქართული
ՀԱՅԵՐԵՆ հայերեն
አማርኛ
你好，世界！
这是一个测试
繁體中文測試
こんにちは世界
カタカナ ｶﾀｶﾅ
がぎぐ がぎぐ
안녕하세요 세계
한글 한글
한국어
Việt Nam tiếng Việt
Tiếng Việt
Türkçe öğretmen ğüşiöç
Polski zażółć gęślą jaźń
Čeština příliš žluťoučký kůň
Íslenska þórr ð æ
ʻOkina Hawaiʻi
Esperanto ĉ ĝ ĥ ĵ ŝ ŭ
ＦＵＬＬ ｗｉｄｔｈ １２３
𝓬𝓾𝓻𝓼𝓲𝓿𝓮 𝔣𝔯𝔞𝔨𝔱𝔲𝔯 𝟙𝟚𝟛
𐍈 𐌰 gothic
𓀀 𓂀 hieroglyph
😀
😀😃😄
a cat 😺 and a dog 🐶
👍🏽 👍 👍🏿
👨‍👩‍👧‍👦 family
🏳️‍🌈 flag
🇩🇪🇫🇷🇯🇵
❤️ ❤ ♥
☕️ coffee
1️⃣ 2️⃣
⭐⭐⭐⭐⭐
→ ← ↑ ↓ ⇒ ⇔
∀x∈ℝ: x²≥0
∑∏∫√∞≈≠≤≥
± × ÷ ° µ § ¶
© ® ™
“smart” ‘quotes’ „german“ «french»
•bullet ·middle
‽ ⁉ ‼
½ cup ¾ full
x̂ ŷ z̃
Z͑ͫ̓ͪ̂ͫ̽͏̴̙A̴̵̜L̵G̶O
ǆ ǅ Ǆ
ŉ ſ
ﷺ
㎏ ㎡ ㍿
Ａ・Ｂ
日本語とEnglishの混在
mixed العربية and English
rtl שלום ltr
line one, line two; line three: end
;;; ::: ,,, ...
!?!?!?
#@$%^&*()
a.b.c
1.2.3.4
1,000,000
10:30am 2026-11-25
+49 170 1234567
C:\\Windows\\System32
/usr/local/bin
~/.config
key=value;other=thing
[[nested]] ((deep))
a,b,c,d
a , b , c
word1word2word3
123abc456def
abc123
x1y2z3
4x4
w/o w/
and/or
24/7
100°C
5'10"
O'Neill D'Artagnan
'tis 'twas
rock-'n'-roll
a'b'c
s't
it''s
ſ's
é's
我's
""".strip("\n").split("\n")

_SPACES = [
    "",
    " ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    " leading",
    "trailing ",
    "two  spaces   three",
    "tab\tbetween",
    "line\nbreak",
    "carriage\r\nreturn",
    "non\u00a0breaking",
    "thin\u2009space",
    "ideographic\u3000space",
    "zero\u200bwidth",
    "zero\u200dwidth joiner",
    "word\u2060joiner",
    "\ufeffbyte order mark",
    "next\u0085line",
    "line\u2028separator",
    "paragraph\u2029separator",
    "vertical\x0btab",
    "form\x0cfeed",
    "nul\x00byte",
    "bell\x07 and escape\x1b[31m",
    "delete\x7f",
    "private \ue000 use",
    "unassigned \u0378 point",
    "noncharacter \ufffe",
    "replacement \ufffd",
    "soft\u00adhyphen",
    "right\u202eto left",
    "combining \u0301 alone",
    "\u0301",
    "a\u0301\u0302\u0303",
    "\U0001f9d1\u200d\U0001f680",
    "tag \U000e0041 character",
]

_LONG = [
    "word " * 74,
    "word " * 75,
    "word " * 76,
    "word " * 200,
    "a" * 1000,
    "é" * 100,
    "😀" * 60,
    "一" * 90,
    "!" * 200,
    "detailed, " * 60 + "the end",
]

STRINGS = _PLAIN + _SPACES + _LONG
