import pytest

from lmdeploy_vico.choices import NO_SPEEDUPS, SPEEDUPS, Experiment, Speedups, parse_compression, parse_speedups


class TestCompression:
    @pytest.mark.parametrize('value', ['auto', 'none', 'all', 0, 1, 0.25])
    def test_accepted_values(self, value):
        assert parse_compression(value) == value

    @pytest.mark.parametrize(
        'value, kind, number',
        [('random:0.5', 'random', 0.5), ('image:.25', 'image', 0.25), ('random:1', 'random', 1.0)],
    )
    def test_experiments(self, value, kind, number):
        assert parse_compression(value) == Experiment(kind, number)
        assert parse_compression(parse_compression(value)) == Experiment(kind, number)
        assert parse_compression(str(Experiment(kind, number))) == Experiment(kind, number)

    @pytest.mark.parametrize(
        'value', ['random', 'random:', 'random:1.5', 'random:-1', 'image:x', 'image:0.5 ', 'all:1']
    )
    def test_other_experiments_are_refused(self, value):
        with pytest.raises(ValueError, match='must be "auto", "none", "all"'):
            parse_compression(value)

    @pytest.mark.parametrize('value', ['half', '', '0.5', -0.1, 1.5, float('nan'), True, None, [], {}])
    def test_other_values_are_refused_by_name(self, value):
        with pytest.raises(ValueError, match=r'^image compression must be "auto", "none", "all", or a number from 0'):
            parse_compression(value, 'image compression')


class TestSpeedups:
    @pytest.mark.parametrize('text', ['', ' ', ',', NO_SPEEDUPS])
    def test_none(self, text):
        assert parse_speedups(text) == NO_SPEEDUPS
        assert not NO_SPEEDUPS

    def test_some(self):
        some = parse_speedups(' residual_norm,padded_patches, ')
        assert some == Speedups(residual_norm=True, padded_patches=True)
        assert some and str(some) == 'residual_norm,padded_patches'

    def test_all(self):
        assert list(parse_speedups(','.join(SPEEDUPS)).names()) == list(SPEEDUPS)

    @pytest.mark.parametrize('value', ['residual', 'cudnn_attention,flash', 1, True, None, ['residual_norm']])
    def test_unknown(self, value):
        with pytest.raises(ValueError, match='vit_speedups must be a comma-separated list of cudnn_attention, resid'):
            parse_speedups(value)
