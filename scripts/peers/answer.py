"""What a no-op model answers: the fields of our own text-to-image endpoint, a 64×64 picture inline."""

PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAIklEQVR4Ae3BAQ0AAADCIPunfg8HDAAAAAAA"
    "AAAAAAAAuBcwQAABTBlSxgAAAABJRU5ErkJggg=="
)
ANSWER = {
    "images": [
        {
            "url": f"data:image/png;base64,{PICTURE}",
            "content_type": "image/png",
            "file_name": "image.png",
            "file_size": 91,
            "width": 64,
            "height": 64,
        }
    ],
    "timings": {"inference": 0.0},
    "seed": 7,
    "has_nsfw_concepts": [False],
    "prompt": "x",
}
