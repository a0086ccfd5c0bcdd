# Short names for what CONTRIBUTING.md describes; the work is done by CMake and deploy/quickstart.sh.
.PHONY: build demo test asan tsan fuzz bench tidy quickstart clean

build:
	sh deploy/quickstart.sh build

demo quickstart:
	sh deploy/quickstart.sh demo

test:
	sh deploy/quickstart.sh test

asan:
	cmake --preset dev && cmake --build --preset dev --parallel && ctest --preset dev

tsan:
	cmake --preset tsan && cmake --build --preset tsan --parallel && ctest --preset tsan

fuzz:
	cmake --preset fuzz && cmake --build --preset fuzz --parallel

bench: build
	build/release/kvloom bench prefill
	build/release/kvloom bench decode

tidy:
	python3 tests/tidy.py

clean:
	rm -rf build
