"""Descriptions of published data sets in this form; README.md says what is known of them and what is not."""

PRESETS = {
    "ddhr_sk": """
name = "ddhr_sk"

[sar]
folder = "korea/GF3"
radiometry = "stretched"

[optical]
folder = "korea/GF2"

[label]
folder = "korea/label"

[split]
train = "korea/train.txt"
test = "korea/val.txt"

[[class]]
name = "buildings"
value = 0
colour = [255, 0, 0]

[[class]]
name = "roads"
value = 1
colour = [0, 0, 255]

[[class]]
name = "greenery"
value = 2
colour = [255, 255, 0]

[[class]]
name = "water"
value = 3
colour = [255, 0, 255]

[[class]]
name = "farmland"
value = 4
colour = [0, 255, 0]
""",
    "pie_rgb_sar": """
name = "pie_rgb_sar"

[sar]
radiometry = "stretched"

[optical]
folder = "rgb"

[split]
train = "train.txt"
test = "val.txt"

[[class]]
name = "background"
value = 0
colour = [128, 128, 128]

[[class]]
name = "city"
value = 1
colour = [235, 51, 36]

[[class]]
name = "road"
value = 2
colour = [255, 253, 85]

[[class]]
name = "water"
value = 3
colour = [66, 236, 245]

[[class]]
name = "forest"
value = 4
colour = [56, 168, 0]

[[class]]
name = "farmland"
value = 5
colour = [168, 112, 0]
""",
    "yeseg_opt_sar": """
name = "yeseg_opt_sar"

[sar]
radiometry = "stretched"

[optical]

[[class]]
name = "background"
value = 0
colour = [0, 0, 0]

[[class]]
name = "bare ground"
value = 1
colour = [31, 119, 180]

[[class]]
name = "low vegetation"
value = 2
colour = [174, 199, 232]

[[class]]
name = "trees"
value = 3
colour = [255, 127, 14]

[[class]]
name = "houses"
value = 4
colour = [255, 187, 120]

[[class]]
name = "water"
value = 5
colour = [44, 160, 44]

[[class]]
name = "roads"
value = 6
colour = [152, 223, 138]

[[class]]
name = "other"
value = 7
colour = [214, 39, 40]
""",
}
